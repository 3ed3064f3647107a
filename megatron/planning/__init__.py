"""What a layout costs, by arithmetic: traffic, memory, time; and the search for the best one."""
