"""Worlds whose features are known, and what SAEs make of them: a small tree (Nabeshima 2024), and a large world."""
