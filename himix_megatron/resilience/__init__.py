"""What keeps a run right and alive: watchdog, loss guard, replica check, journal, goodput."""
