"""The cluster that a host belongs to: settings, members, presence, and the client of a peer."""
