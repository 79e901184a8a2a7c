"""What a coordinator decides: commands, admission, liveness, formats. Pure."""
