"""One file for each library's checkpoints: how they are recognised, read and, where that is possible, written."""
