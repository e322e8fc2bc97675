"""The routes: control plane, compute plane, admin API, pages."""
