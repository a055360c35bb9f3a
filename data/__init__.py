"""Where samples come from and how they are stored: images, views, the token layout, token shards. Knows no model."""
