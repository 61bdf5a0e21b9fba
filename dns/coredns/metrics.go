package coredns

import (
	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	mesh "meshd.dev/dns"
)

var dropped = promauto.NewCounter(prometheus.CounterOpts{
	Namespace: plugin.Namespace,
	Subsystem: mesh.Name,
	Name:      "dropped_total",
	Help:      "Questions and connections dropped because too many were waiting.",
})
