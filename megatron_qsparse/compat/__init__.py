"""Everything that adapts another library, in one place, each entry with its reason."""
