"""What the other rooms share; nothing here imports torch or transformers when it is loaded."""
