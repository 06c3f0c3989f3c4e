"""Where fastres meets other packages. Every module here imports its package only when it is used."""
