"""Back up a central site beside a running server, and make a site from a backup again.

The file is specified in docs/spec/backup.md.
"""
