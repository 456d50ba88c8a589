"""The agent's HTTP API: schemas, routes, errors on the wire, server and client."""
