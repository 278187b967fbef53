"""Who may take part: invitations, clinics, their keys and how these are renewed."""
