package dns

import (
	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"meshd.dev/dns/index"
)

// answers is registered where CoreDNS registers its own metrics, the default
// registry, so that whoever serves those serves this.
var answers = promauto.NewCounterVec(prometheus.CounterOpts{
	Namespace: plugin.Namespace,
	Subsystem: Name,
	Name:      "answers_total",
	Help:      "Answers about names of the cluster, by result: success, nodata, nxdomain, notready.",
}, []string{"result"})

var (
	answeredSuccess  = answers.WithLabelValues("success")
	answeredNoData   = answers.WithLabelValues("nodata")
	answeredNXDomain = answers.WithLabelValues("nxdomain")
	answeredNotReady = answers.WithLabelValues("notready")
)

// Count counts one answer. The plugin calls it; so does a server that asks the
// index without going through the plugin.
func Count(code index.Code, records bool) {
	switch {
	case code == index.NotReady:
		answeredNotReady.Inc()
	case code == index.Missing:
		answeredNXDomain.Inc()
	case records:
		answeredSuccess.Inc()
	default:
		answeredNoData.Inc()
	}
}
