"""What people look at: console, trackers, tables, one group token by token, plots."""
