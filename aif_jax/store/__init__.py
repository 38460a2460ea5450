"""What is written to folders and how it is named: atomic folders and files, leases, versions, rows of snapshots."""
