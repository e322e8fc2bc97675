"""What outlives the process: state, plans, objects."""
