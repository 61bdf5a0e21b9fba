package nodeauth

import (
	"slices"
	"strings"

	"k8s.io/apiserver/pkg/authentication/user"
)

const (
	userPrefix = "system:node:"
	nodesGroup = user.NodesGroup
)

// NodeName returns the node an identity speaks for. isNode is true for every
// member of system:nodes; such an identity with an empty name may do nothing.
func NodeName(u user.Info) (name string, isNode bool) {
	if u == nil || !slices.Contains(u.GetGroups(), nodesGroup) {
		return "", false
	}
	name, found := strings.CutPrefix(u.GetName(), userPrefix)
	if !found {
		return "", true
	}
	return name, true
}
