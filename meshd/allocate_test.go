package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// grant gives the service accounts of an overlay the rights it has for them.
func grant(t *testing.T, api kubernetes.Interface, overlay string) {
	t.Helper()
	objects, _ := rendered(t, overlay)
	for _, obj := range objects {
		var err error
		switch o := obj.(type) {
		case *corev1.Namespace:
			_, err = api.CoreV1().Namespaces().Create(t.Context(), o, metav1.CreateOptions{})
		case *rbacv1.ClusterRole:
			_, err = api.RbacV1().ClusterRoles().Create(t.Context(), o, metav1.CreateOptions{})
		case *rbacv1.ClusterRoleBinding:
			_, err = api.RbacV1().ClusterRoleBindings().Create(t.Context(), o, metav1.CreateOptions{})
		case *rbacv1.Role:
			_, err = api.RbacV1().Roles(o.Namespace).Create(t.Context(), o, metav1.CreateOptions{})
		case *rbacv1.RoleBinding:
			_, err = api.RbacV1().RoleBindings(o.Namespace).Create(t.Context(), o, metav1.CreateOptions{})
		}
		if err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
}

// as is a kubeconfig for a service account in namespace meshd.
func as(t *testing.T, kubeconfig, account string) string {
	t.Helper()
	kc, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	kc.AuthInfos["admin"].Impersonate = "system:serviceaccount:meshd:" + account
	kc.AuthInfos["admin"].ImpersonateGroups = []string{"system:serviceaccounts", "system:authenticated"}
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*kc, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// Two of them, with the rights of the manifests and no more, give every node a
// range of its own.
func TestAllocate(t *testing.T) {
	config, kubeconfig := testAPI(t)
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	grant(t, api, "eks")
	cfg := &allocateConfig{}
	args := allocateArgs(t)
	cmd, rest, err := newCommand().Find(args)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.ParseFlags(rest); err != nil {
		t.Fatal(err)
	}
	cfg.PodCIDRs, _ = cmd.Flags().GetStringSlice("pod-cidr")
	cfg.LeaseNamespace, _ = cmd.Flags().GetString("lease-namespace")
	cfg.Mask4, cfg.Mask6, cfg.LogLevel, cfg.Kubeconfig = 24, 64, "error", as(t, kubeconfig, "meshd-allocate")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- cfg.run(ctx) }()
	}
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	const nodes = 5
	for i := range nodes {
		if _, err := api.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("n", i)}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	until(t, func() error {
		list, err := api.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		taken := map[string]bool{}
		for _, n := range list.Items {
			taken[n.Spec.PodCIDR] = true
		}
		if taken[""] || len(taken) != nodes {
			return fmt.Errorf("the ranges are %v", taken)
		}
		return nil
	})
	lease, err := api.CoordinationV1().Leases("meshd").Get(t.Context(), allocateLease, metav1.GetOptions{})
	if err != nil || lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity == "" {
		t.Errorf("lease %+v, %v", lease, err)
	}
}

func allocateArgs(t *testing.T) []string {
	t.Helper()
	objects, _ := rendered(t, "eks")
	for _, obj := range objects {
		if d, ok := obj.(*appsv1.Deployment); ok {
			return d.Spec.Template.Spec.Containers[0].Args
		}
	}
	t.Fatal("the overlay has no Deployment")
	return nil
}

// until waits for ok and says what it was missing.
func until(t *testing.T, ok func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := ok()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(errors.Join(err, ctx.Err()))
		case <-time.After(20 * time.Millisecond):
		}
	}
}
