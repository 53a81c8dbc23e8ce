"""The quality study: real text tasks, a real pretrained encoder, and what merging does to their accuracy."""
