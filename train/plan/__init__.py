"""Everything that is known of a run before it starts; the room where every `auto` is decided."""
