"""What a layout costs: memory, traffic and time, and the search for the best one."""
