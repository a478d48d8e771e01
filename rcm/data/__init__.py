"""Data sets. Each is a module with a config that loads it; nothing else depends on which one."""
