"""Scenarios that an operator reads (docs/scenarios), carried out by real components."""
