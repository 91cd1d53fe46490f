"""From YAML to a tree of frozen nodes, with the origin of every value and all errors at once."""
