"""Claims of papers, one file each; `bloomery claim NAME` runs one. Files that start with `_` are shared by several."""
