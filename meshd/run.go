package main

import (
	"log/slog"
	"os"
	"runtime/debug"
	"time"

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

const notifyVariable = "NOTIFY_SOCKET"

// notifySocket is where systemd hears of us, where it started us with
// Type=notify.
var notifySocket string

// hideNotifySocket takes it out of the environment, before anything else runs:
// k8s.io/apiserver says READY=1 by itself when it begins to listen, a second
// before it serves, and what meshd starts is not what systemd waits for.
func hideNotifySocket() {
	notifySocket = os.Getenv(notifyVariable)
	_ = os.Unsetenv(notifyVariable)
}

// notifyReady tells systemd.
func notifyReady() {
	if notifySocket == "" {
		return
	}
	_ = os.Setenv(notifyVariable, notifySocket)
	_, _ = daemon.SdNotify(true, daemon.SdNotifyReady)
}

const (
	// gcPercent of what is in use may be garbage before it is collected. A node
	// is idle most of the time, and its memory is the pods'.
	gcPercent = 50
	// started is when what only the start needed can go back to the machine,
	// of which the runtime keeps most for minutes.
	started = 10 * time.Second
)

// frugal has this process keep little memory that it does not use. GOGC in the
// environment says otherwise.
func frugal() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	time.AfterFunc(started, debug.FreeOSMemory)
}
