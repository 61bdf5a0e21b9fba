package apiserver

import (
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/component-base/compatibility"
	baseversion "k8s.io/component-base/version"
)

// Version is what the server calls itself: the Kubernetes it is compatible
// with, and whose it is.
const Version = "v1.37.2+meshd"

// effectiveVersion says Version at /version without linker flags.
type effectiveVersion struct{ compatibility.EffectiveVersion }

func newVersion() effectiveVersion {
	return effectiveVersion{compatibility.NewEffectiveVersionFromString(baseversion.DefaultKubeBinaryVersion, "", "")}
}

// Info implements compatibility.EffectiveVersion.
func (v effectiveVersion) Info() *version.Info {
	info := v.EffectiveVersion.Info()
	info.GitVersion, info.GitTreeState, info.GitCommit = Version, "", ""
	return info
}
