"""The tree-of-features toy model (Nabeshima 2024)."""
