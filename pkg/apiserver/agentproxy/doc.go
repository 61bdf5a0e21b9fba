// Package agentproxy connects clients of the API with the agents of the nodes:
// logs, exec, attach, port-forward and nodes/proxy.
//
// Wiring:
//
//	agentproxy.AddToScheme(scheme) // query parameters to PodLogOptions and so on
//	proxy, err := agentproxy.New(agentproxy.Config{
//		Pods: podStore, Nodes: nodeStore, // rest.Getter
//		TLS:        cfg.AgentTLS,         // client certificate and the CA of the agents
//		Authorizer: authz,
//	})
//	maps.Copy(coreV1Storage, proxy.Storage()) // "pods/log", "pods/exec", "pods/attach", "pods/portforward", "nodes/proxy"
//
// "pods/log" is a rest.GetterWithOptions, the others are rest.Connecter.
//
// # What an agent serves
//
// HTTPS on status.daemonEndpoints.kubeletEndpoint.Port of its Node (10250 when
// that is 0) on one of its InternalIP addresses, with a certificate for the
// node's name, at the kubelet's paths:
//
//	GET  /containerLogs/{namespace}/{pod}/{container}?follow=true&previous=true&timestamps=true
//	       &sinceSeconds=N&sinceTime=RFC3339&tailLines=N&limitBytes=N&stream=All
//	POST /exec/{namespace}/{pod}/{container}?command=a&command=b&input=1&output=1&error=1&tty=1
//	POST /attach/{namespace}/{pod}/{container}?input=1&output=1&error=1&tty=1
//	POST /portForward/{namespace}/{pod}
//	ANY  /{path} for nodes/proxy
//
// exec, attach and portForward are SPDY upgrades; WebSocket clients with the
// newer protocols (v5.channel.k8s.io, SPDY tunnelled in WebSocket, as kubectl
// 1.31 and later use) are translated here. Older WebSocket protocols reach the
// agent unchanged, by GET, and the cri-streaming library serves them.
//
// # Safety
//
// Only addresses in the Node's own status are dialed, and what answers must
// have a certificate for that node's name from the CA in TLS: a node that
// publishes another machine's address gains nothing. Redirects are not
// followed. A GET that upgrades needs the right to create, too.
package agentproxy
