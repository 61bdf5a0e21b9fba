// Package eviction serves pods/eviction (policy/v1): the polite way to delete a
// pod, which a PodDisruptionBudget can refuse with 429.
//
// Wiring:
//
//	coreV1Storage["pods/eviction"] = eviction.New(eviction.Config{
//		Pods:         podStore,       // Get and Delete
//		Budgets:      pdbStore,       // List
//		BudgetStatus: pdbStatusStore, // Update of policy/v1 poddisruptionbudgets/status
//	})
//
// The budget is charged before the pod is deleted, by a conditional update of
// the budget's status (disruptionsAllowed less one, the pod remembered in
// disruptedPods), so that two evictions never spend the same disruption. The
// disruption controller gives back what was charged for pods that stay.
package eviction
