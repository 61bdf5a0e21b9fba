package main

import (
	"log/slog"

	"github.com/coreos/go-systemd/v22/daemon"
	"k8s.io/klog/v2"
)

// Roles of a machine.
const (
	roleServer = "server"
	roleAgent  = "node"
	roleGuest  = "agent" // of a Kubernetes cluster somebody else runs
)

// release is set by the linker.
var release = "dev"

func version() string { return release }

// quietLibraries sends what the Kubernetes libraries and CoreDNS log through
// ours.
func quietLibraries(log *slog.Logger) {
	slog.SetDefault(log)
	klog.SetSlogLogger(log.With("part", "kubernetes"))
}

// notifyReady tells systemd, where it started us with Type=notify.
func notifyReady() { _, _ = daemon.SdNotify(false, daemon.SdNotifyReady) }
