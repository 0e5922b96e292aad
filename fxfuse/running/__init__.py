"""A fused region when it is called: guards, programs, fallbacks, and how a module becomes one."""
