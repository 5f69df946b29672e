"""Rank, sort, prune, grow and code: any dictionary as a progressive one."""
