"""The down-projection V·x."""
