"""The patches of a layer, such as LoRAs: read, tried, and computed with a packed weight."""
