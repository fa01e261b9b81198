"""What a determined trainer still learns from published bytes: every defense, chosen on validation, worst first."""
