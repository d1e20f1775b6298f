"""What measures: cases, contestants, the processes that run them, the driver that tells them what to run, and the table."""
