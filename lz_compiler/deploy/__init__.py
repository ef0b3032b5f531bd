"""Planning before traffic: `lz.solve` over shape buckets, baked files, warm-up, and the proof that they cover what was declared."""
