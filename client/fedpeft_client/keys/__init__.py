"""A box's keys and those it trusts: how it joins, renews them, and knows other clinics."""
