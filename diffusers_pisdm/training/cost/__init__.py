"""What training costs, counted and measured before it is started."""
