"""Data loading and storage: images, views, the token layout and token shards. Independent of all models."""
