"""Hidden states kept on disk, or wherever fsspec reaches, for several runs."""
