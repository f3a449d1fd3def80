"""What the router did on a task: profile, scores, selection of experts, concentration and overlap."""
