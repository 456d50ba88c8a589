"""semperd: the agent of a host as a service, its log and its word to systemd."""
