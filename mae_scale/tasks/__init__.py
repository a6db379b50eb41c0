"""What `mae-scale COMMAND` does, one short file each."""
