"""H-Net's dynamic chunking in one dimension: cosine router and EMA dechunker in scan order."""
