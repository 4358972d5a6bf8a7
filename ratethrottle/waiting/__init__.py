"""What outlives one decision: callers that wait for capacity, and the blocks and functions that `limiter.limit` guards."""
