"""The routes: control plane, compute plane, admin API and pages."""
