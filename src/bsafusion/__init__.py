"""Align and fuse two unaligned medical images."""
