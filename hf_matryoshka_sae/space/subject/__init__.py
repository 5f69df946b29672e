"""What the page is about: SAEs that are open, their indexes and trees, and answers to questions about them."""
