"""Raw rows -> validated, split, rendered, tokenised, packed and memory-mapped."""
