"""Networks. Each is a module with a config that builds it; nothing else depends on which one."""
